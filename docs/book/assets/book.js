document.addEventListener("DOMContentLoaded", () => {
  // The theme's arrows that open a part of the sidebar have no name; a screen reader needs one.
  for (const arrow of document.querySelectorAll(".bd-links summary")) {
    const page = arrow.closest("li").querySelector("a").textContent;
    arrow.setAttribute("aria-label", `Pages under ${page}`);
  }
  // What the search quotes of a page would begin with the labels of the theme's buttons.
  if (typeof Search !== "undefined") {
    Search.htmlToText = (html) => {
      const article = new DOMParser().parseFromString(html, "text/html").querySelector("article");
      article?.querySelectorAll(".headerlink, script, style").forEach((part) => part.remove());
      return article?.textContent ?? "";
    };
  }
});
