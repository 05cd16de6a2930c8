"""What is evaluated, whatever it is: texts and pictures in, vectors out, every choice told."""
