"""A federation in one process: the silos' own handlers, reached by function calls."""
