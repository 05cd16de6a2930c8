"""Builds an untrained model from two towers."""
