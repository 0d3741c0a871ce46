"""What is shown of the metrics, and when somebody is called: tables, and the files that are made from them."""
