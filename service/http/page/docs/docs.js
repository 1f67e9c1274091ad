// Swagger UI for the service's OpenAPI document.

// Swagger UI renders descriptions as HTML. The page's policy allows that only here, and only for plain tags.
const PLAIN = /^(?:[^<]|<\/?(?:p|b|i|em|strong|code|pre|ul|ol|li|br)>)*$/;
window.trustedTypes?.createPolicy("default", {
  createHTML: (html) => (PLAIN.test(html) ? html : html.replaceAll("<", "&lt;")),
});

SwaggerUIBundle({ url: "openapi.json", dom_id: "#swagger-ui", deepLinking: true });
