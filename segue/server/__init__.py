"""The front end: the gRPC services, tokenisation, and the engine process behind them. Imports no torch."""
