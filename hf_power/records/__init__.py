"""Files of a run and how they are read: JSON checked before anything is believed, rows, atomic writes, provenance."""
