"""The cards of the registry, by what they test. Counts and licenses are the publishers' own."""
