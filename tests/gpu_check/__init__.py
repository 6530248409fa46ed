"""`make gpu-check`: what a first day with a GPU must show, in one command; on a machine without one a reduced form."""
