"""Runs the whole method, from two small pretrained towers to a search in a folder of images."""
