"""Checks of a model folder: does it give the embeddings that it was written with?"""
