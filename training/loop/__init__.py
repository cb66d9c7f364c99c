"""What the loop works with."""
