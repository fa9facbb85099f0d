"""What people and judges say of answers: items by content, one store, the page, the AI judge."""
