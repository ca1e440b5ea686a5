"""The commands of `tandem`, one module each. add() makes the command's parser, and sets `run` to what runs it.

What is imported here must do with a base install. What a command needs beside that is imported when it runs, after
require_extra().
"""
