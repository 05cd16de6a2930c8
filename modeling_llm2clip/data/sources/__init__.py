"""One file per format; each yields raw records and knows no other format."""
