"""The main job on real parts, from two towers to a searched image folder."""
