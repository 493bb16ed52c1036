"""A Flower app as Flower's own template for Keras makes it: what users of Flower have without this project."""
