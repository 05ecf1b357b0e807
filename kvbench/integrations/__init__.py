"""What follows other projects' conventions."""
