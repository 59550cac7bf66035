/* The theme: the system's, or the one that the reader chose.

Runs before the page is drawn, so that it never flashes in the other theme. Knows nothing about the rest of the page.
*/

(() => {
  const KEY = "molora-theme";
  const systemIsDark = matchMedia("(prefers-color-scheme: dark)");
  const root = document.documentElement;

  const system = () => (systemIsDark.matches ? "dark" : "light");
  const current = () => root.dataset.theme ?? system();

  // A browser that keeps nothing (blocked storage) still gets the toggle.
  const read = () => {
    try {
      return localStorage.getItem(KEY);
    } catch {
      return null;
    }
  };
  const remember = (theme) => {
    try {
      if (theme === null) localStorage.removeItem(KEY);
      else localStorage.setItem(KEY, theme);
    } catch {}
  };

  const apply = (theme) => {
    if (theme === "light" || theme === "dark") root.dataset.theme = theme;
    else delete root.dataset.theme;
  };

  apply(read());

  document.addEventListener("DOMContentLoaded", () => {
    const button = document.getElementById("theme");
    const name = () => {
      const other = current() === "dark" ? "light" : "dark";
      button.ariaLabel = button.title = `Use the ${other} theme`;
    };
    button.addEventListener("click", () => {
      const other = current() === "dark" ? "light" : "dark";
      const chosen = other === system() ? null : other; // the system's own: follow it again
      apply(chosen);
      remember(chosen);
      name();
    });
    systemIsDark.addEventListener("change", name);
    name();
  });
})();
