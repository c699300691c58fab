"""vLLM behind HTTP: the engine that talks to servers, and everything that runs beside and inside of them."""
