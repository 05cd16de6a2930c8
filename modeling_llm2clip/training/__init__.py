"""The stages of the method, one module each; stages never import stages."""
