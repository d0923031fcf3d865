"""Callbacks for other people's training; each module needs the library that it is named after."""
