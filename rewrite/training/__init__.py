"""What happens while a live model trains: hooks, the loop and Trainer, what backward keeps, and the smaller model afterwards."""
