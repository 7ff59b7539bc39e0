"""The command line. Nothing here imports torch before a chosen command needs it."""
