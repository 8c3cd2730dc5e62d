"""Open collaboration: volunteers train one network together (DeDLOC), on hivemind's network and matchmaking."""
