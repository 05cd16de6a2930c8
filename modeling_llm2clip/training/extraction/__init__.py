"""Stage 2: captions and images into embedding stores."""
