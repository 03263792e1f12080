"""The step: batches, joint loss, optimizer, engine; one assembly and one step for all who take it."""
