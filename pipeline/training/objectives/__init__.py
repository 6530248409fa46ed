"""What a training learns from its pairs, by which loss: a file per objective, and the formulas of the losses."""
