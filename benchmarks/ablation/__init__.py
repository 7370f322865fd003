"""Train the steps from a plain transformer to DiMR for equal time and compare them."""
