//! HTTP only: routes, limits, handlers, SSE.
