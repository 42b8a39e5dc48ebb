"""An artifact against its oracle."""
