"""Device, process, file and number helpers that every part of the package may use."""
