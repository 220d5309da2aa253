"""The studies behind claims about quality, each resumable, each one command."""
