"""The engine process: step loop, model runner, page pool, adapter store."""

if __name__ != "segue.engine":
    raise ImportError("this folder is the package segue.engine: import it as segue.engine")
