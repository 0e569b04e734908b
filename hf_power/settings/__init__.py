"""What a run is told: one YAML of five sections."""
