"""The command `archipelago`: names of what can be done, and the modules that do it."""
