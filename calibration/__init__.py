"""Text to token windows, replay of decoder layers, the hidden-state store, and second moments."""
