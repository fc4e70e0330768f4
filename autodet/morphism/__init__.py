"""Morphism: actions that change a detector's architecture and keep as much of its weights as can be."""
