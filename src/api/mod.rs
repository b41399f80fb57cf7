//! Wire types and their validation; no axum. Every 400 is born here.
