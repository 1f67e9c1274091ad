"""From a network and its training images to trained weights."""
