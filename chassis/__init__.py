"""What every process needs and no product word: the frame the services are mounted on."""
