"""What a picture shows, read from its Figure."""


def lines(panel, marker, length=None):
    """Lines of a panel with a marker, and with a number of points."""
    found = [line for line in panel.lines if line.get_marker() == marker]
    return [line for line in found if length is None or len(line.get_xdata()) == length]


def xy(line):
    """The points of a line."""
    return list(zip(*line.get_data(), strict=True))


def visible(figure):
    """Panels that are not blank."""
    return [panel for panel in figure.axes if panel.axison]


def legend(figure):
    """The words of a figure's legend."""
    return [text.get_text() for text in figure.legends[0].get_texts()]


def verticals(panel):
    """Where a panel has lines from its bottom to its top."""
    return [line.get_xdata()[0] for line in panel.lines if list(line.get_ydata()) == [0, 1]]
