"""The specs of the registry and their readers, by what they test; counts are the publishers'."""
