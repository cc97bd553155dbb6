"""How a model is called: which calls it has, their example inputs, and how arguments become flat inputs and outputs become what the original returns."""
