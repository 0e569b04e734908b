"""From the rows of a sweep to the law of the optimal learning rate."""
