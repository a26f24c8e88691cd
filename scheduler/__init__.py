"""Pure decisions: which requests run, where, and on what. No torch, no clock, no input or output."""

if __name__ != "segue.scheduler":
    raise ImportError("this folder is the package segue.scheduler: import it as segue.scheduler")
