"""A Flower app as Flower's own template for Keras makes it, without this project."""
