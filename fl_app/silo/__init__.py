"""A silo: a SuperNode, and one living worker that does its tasks with data, model and compiled step
warm.
"""
