"""The cards of the registry, by what they test. Counts and licences are the publishers' own."""
