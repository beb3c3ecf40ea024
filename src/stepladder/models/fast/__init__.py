"""What memories with fast weights share: where chunks lie, how they are walked, update rules, decay."""
