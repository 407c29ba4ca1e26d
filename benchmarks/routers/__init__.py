"""Routers side by side: each says what it keeps of the keys and how it scores; all else is common."""
