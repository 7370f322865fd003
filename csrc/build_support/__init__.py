"""How the package is built: what `setup.py` needs to know of the machine, and the pip hooks."""
