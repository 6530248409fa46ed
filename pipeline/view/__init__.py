"""A browser of runs: what its pages are made of, the server on loopback, the folder for any web server."""
