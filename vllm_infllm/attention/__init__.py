"""The attention backend: metadata, layer implementation and rotary tables."""
